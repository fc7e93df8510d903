//! What is there, for people who ask why a device is not used.

use crate::error::Result;
use crate::raw::Driver;

/// What the CUDA driver of this machine says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DriverInfo {
    /// The library that was loaded.
    pub library: String,
    /// Newest CUDA version that it supports: major and minor.
    pub version: (u32, u32),
    /// Names of the devices that this process may use, by ordinal.
    pub devices: Vec<String>,
}

/// Loads the driver and asks it for its devices. Makes no context and takes no device memory.
///
/// # Errors
/// The driver is missing, is not usable, or refuses to start: as every use of a device would.
pub fn probe() -> Result<DriverInfo> {
    info(Driver::installed()?)
}

pub(crate) fn info(driver: &'static Driver) -> Result<DriverInfo> {
    driver.init()?;
    let devices = (0..driver.device_count()?)
        .map(|ordinal| driver.device_name(ordinal))
        .collect::<Result<_>>()?;
    Ok(DriverInfo {
        library: driver.library().to_owned(),
        version: driver.version()?,
        devices,
    })
}
