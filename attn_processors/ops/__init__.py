"""Pure tensor functions, each fast path next to a reference written for reading. Imports torch only."""
