"""Probes of trained and untrained networks."""
