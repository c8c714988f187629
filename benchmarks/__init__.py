"""What crossmix costs and what it scores: speed/, study/, and publish.py, which writes the figures into the docs."""
