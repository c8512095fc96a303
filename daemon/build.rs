//! Compiles the kubelet's interfaces; no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["proto/deviceplugin.proto", "proto/podresources.proto"];
    println!("cargo::rerun-if-changed=proto");
    let described = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure().compile_fds(described)?;
    Ok(())
}
