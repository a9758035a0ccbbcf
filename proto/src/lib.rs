//! The gRPC control plane's messages, generated code and checked types.
