"""In and out of ASGI: the application, what every request passes first, and how an answer is sent."""
