"""What may be asked: the bodies of requests, and the parameters that are refused."""
