//! Compiles the `.proto` files with protox, so that no system `protoc` is needed.

/// The messages without a derived `Debug`, because they have secrets or contain a message that has.
/// `src/lib.rs` implements it for them.
const SECRET_BEARING: [&str; 6] = [
    ".csi.v1.NodePublishVolumeRequest",
    ".csi.v1.NodeStageVolumeRequest",
    ".csi.v1.NodeExpandVolumeRequest",
    ".v1alpha1.MountRequest",
    ".v1alpha1.MountResponse",
    ".v1alpha1.File",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["csi.proto", "provider.proto", "registration.proto"];
    for file in files {
        println!("cargo::rerun-if-changed=proto/{file}");
    }
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure()
        .skip_debug(SECRET_BEARING)
        // Servers answer `Unimplemented` to the calls that they leave out.
        .generate_default_stubs(true)
        .compile_fds(descriptors)?;
    Ok(())
}
