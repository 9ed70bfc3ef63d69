"""What the training loop is made of; train.py reads top to bottom and calls into here."""
