"""What is taught about recurrent networks, each claim as a small experiment with a figure and a number."""
