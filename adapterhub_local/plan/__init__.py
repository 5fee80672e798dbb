"""What a training run will need: bytes, time, and the strategy that fits the device. No torch here."""
