"""Classes of the user's whose methods are tools in conversations, in processes of their own."""
