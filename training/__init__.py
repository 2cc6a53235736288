"""Trains LSTM, GRU and RNN models whose state is carried, and exports them for the service."""
