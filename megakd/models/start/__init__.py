"""What a student begins with: `plan.py` says which weights, the other modules read one kind of them each."""
