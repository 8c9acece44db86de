"""What the processes of one store ask each other, over HTTP."""
