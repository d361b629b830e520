"""State that earlier versions left behind, one directory per version. `record.py` makes them."""
