"""Reports for deciding: what a run ends with, and artifacts side by side."""
