//! Tables of functions of a library that is found at run time.

/// A function that a library does not have.
pub(super) struct Missing {
    pub(super) symbol: &'static str,
    /// The loader's answer.
    pub(super) message: String,
}

/// Declares a table of functions. A result is a plain number: a Rust enum must not meet a code that it does not know.
macro_rules! table {
    ($(#[$about:meta])* $table:ident { $($name:ident($($argument:ty),*);)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy)]
        #[allow(non_snake_case, reason = "the names are the library's")]
        pub(super) struct $table {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) -> u32,)*
        }

        impl $table {
            /// # Safety
            /// Functions of `library` that have these names have these signatures.
            unsafe fn resolve(
                library: &libloading::Library,
            ) -> std::result::Result<Self, $crate::raw::table::Missing> {
                Ok(Self {
                    $($name: {
                        // SAFETY: the caller vouches for the signature.
                        let found = unsafe { library.get(stringify!($name)) };
                        *found.map_err(|error| $crate::raw::table::Missing {
                            symbol: stringify!($name),
                            message: error.to_string(),
                        })?
                    },)*
                })
            }
        }
    };
}
pub(super) use table;
