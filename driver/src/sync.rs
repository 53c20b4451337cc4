//! x
mod tls;
