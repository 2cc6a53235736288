"""Looking inside a run: pictures of how it learnt, what its memory holds and what it says."""
