"""Training and evaluation data: files or Hub datasets in several formats become chats. No torch here."""
