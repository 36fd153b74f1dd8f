"""What plan.py knows: one real step on tensors without contents."""
