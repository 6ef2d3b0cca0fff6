"""Training and evaluation of one run. Imported for its modules; `normlab.train` is the front door."""
