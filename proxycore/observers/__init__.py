"""Built-in observers: add-ons on the same public hooks that third parties use."""
