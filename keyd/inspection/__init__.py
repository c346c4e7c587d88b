"""What an administrator's commands look at from outside. No keyd that serves loads any of it."""
