"""Other engines behind our gateway: their own command lines, in environments and processes of their own."""
