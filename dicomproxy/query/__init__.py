"""C-FIND: who is asked, which answers match, and how they become one answer."""
