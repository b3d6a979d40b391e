"""Accuracy, retrieval and linear probes of any model on any data: `effclip evaluate`."""
