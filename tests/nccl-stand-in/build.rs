//! Gives the library the name under which programs look for NCCL.

fn main() {
    // Once a process has loaded a library of this name, by whatever path, the loader takes it for NCCL.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libnccl.so.2");
    println!("cargo::rerun-if-changed=build.rs");
}
