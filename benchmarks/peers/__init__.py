"""What others would write instead: each serves the same graph, in a process of its own."""
