"""What the ``shifcon`` commands do: each a function from files to a folder, which returns what to print."""
