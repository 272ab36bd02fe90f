//! An image that is mounted as a volume: its layers are the box's, as those of the containers' own images are.

mod support;

use a3s_box_core::image::Layer;
use a3s_box_core::spec::{MountSource, MountSpec, SessionSpec};
use a3s_box_protocol::proto::mount::Source;
use support::{World, container, image, launch, pod};

fn with_image(mut spec: SessionSpec, layers: Vec<Layer>) -> SessionSpec {
    let source = MountSource::Image {
        reference: "model:1".to_owned(),
        id: "sha256:77".to_owned(),
        layers,
        sub_path: "weights".to_owned(),
    };
    spec.mounts.push(MountSpec { source, target: "/model".to_owned(), readonly: true, options: Vec::new() });
    spec
}

#[test]
fn layers_are_attached_once_however_they_are_used_and_outlive_the_daemon() {
    let world = World::new();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    let own = image(world.dir.path());
    let model = Layer { diff_id: "sha256:0b".to_owned(), erofs: world.path("model.erofs") };
    std::fs::write(&model.erofs, b"model").unwrap();
    // One layer is the container's and the volume's.
    let layers = vec![own.layers[0].clone(), model];
    let (id, machine) = daemon.run(async {
        let id = m.run_box(pod("p", &world.path("logs"))).await.unwrap();
        let machine = world.vmm.machine(m.box_status(&id).unwrap().vmm_pid.unwrap());
        let spec = with_image(container("a", &["sleep"]), layers.clone());
        launch(&m, &id, spec, own.clone()).await.unwrap();
        (id, machine)
    });
    let attached = ["images/layer.erofs", "images/model.erofs"];
    assert_eq!(*machine.mounts.lock().unwrap(), attached);
    let mounts = machine.guest.mounts.lock().unwrap().clone();
    let Some(Source::Image(volume)) = &mounts[0].source else { panic!("{mounts:?}") };
    assert_eq!(volume.layers, ["layer.erofs", "model.erofs"]);
    assert_eq!((volume.sub_path.as_str(), mounts[0].readonly), ("weights", true));

    daemon.kill();
    let daemon = world.daemon();
    let m = daemon.manager.clone();
    daemon.run(async {
        let spec = with_image(container("b", &["sleep"]), layers.clone());
        launch(&m, &id, spec, own.clone()).await.unwrap();
        assert_eq!(*machine.mounts.lock().unwrap(), attached);
        assert_eq!(m.list_sessions().iter().filter(|session| !session.spec.mounts.is_empty()).count(), 2);
        m.remove_box(&id).await.unwrap();
    });
    assert_eq!(world.leftovers(), Vec::<String>::new());
}
