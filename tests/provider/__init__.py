"""The provider in both OpenSSLs, and under sanitizers."""
