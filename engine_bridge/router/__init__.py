"""What a router of live engines knows, and how a policy chooses by it."""
