"""`effclip sweep`: accuracy, cost, speed and memory of one model over reducers, keep rates, places and thresholds."""
