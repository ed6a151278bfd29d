"""What the mains and engines are made of: one subject a module."""
