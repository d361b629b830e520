"""The only room that speaks Redis: client, endpoints, the store with its scripts, and the feed of events.

Start with `store`: it holds every command, and scripts.lua every change of state.
"""
