"""One HTML page of one run or several, read without torch."""
