"""The machine: processes and signals, the managed Redis, and the files of a town directory.

Nothing here knows HTTP. Start with `processes`; `town_dir` names every file.
"""
