"""The trainers that beside_peers.py compares, one file each; every run is a process of its own."""
