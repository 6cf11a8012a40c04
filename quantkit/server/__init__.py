"""The service around the command line: runs, where they are executed, and the web page."""
