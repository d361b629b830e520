"""The only package that speaks Redis: the client, the endpoints, the store with its scripts, and the event feed.

Start with `store`, which has a method for every command. scripts.lua holds every change of state.
"""
