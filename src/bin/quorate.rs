//! The one binary; everything is in the library.

use std::process::ExitCode;

// A gRPC call makes and frees some forty objects, many of a kilobyte or two, which glibc's malloc
// merges and splits again: a third of a node's throughput on unary calls.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    quorate::cli::run()
}
