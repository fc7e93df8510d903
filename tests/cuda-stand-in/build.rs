//! Gives the library the name under which programs look for the CUDA driver.

fn main() {
    // Once a process has loaded a library of this name, by whatever path, the loader takes it for the driver.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1");
    println!("cargo::rerun-if-changed=build.rs");
}
