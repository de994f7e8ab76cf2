"""What starting and stopping servers needs of SGLang, up in half a second: put its folder on PYTHONPATH."""
