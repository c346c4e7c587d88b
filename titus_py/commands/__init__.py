"""What an administrator types, beside ``serve``: short-lived programs that look, ask and print."""
