"""What people bring: images, labels, logits, numbers and modules, made what the rest expects."""
