//! Who asks.

/// Who asks. Today everybody who can connect may do everything; authorisation has its place here.
#[derive(Clone, Copy, Debug, Default)]
pub struct Caller;
