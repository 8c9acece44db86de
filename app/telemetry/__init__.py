"""What the process says about itself: logs, and how much memory it uses."""
