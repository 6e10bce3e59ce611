"""What is published beside the weights: the model card, the page, signatures, the upload; all from files."""
