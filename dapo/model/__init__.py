"""What a Hugging Face directory says: sizes, names, files; and whether a layout can hold the model."""
