"""What a Hugging Face directory says: sizes, files, and whether a layout can hold the model. No process
groups.
"""
