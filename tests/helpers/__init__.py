"""What tests share; each module is named by what it makes. A test module imports from here, never from another test module."""
