//! Fields of objects, and who set them: what server-side apply needs. Pure.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

/// From the object down to a value.
pub type Path = Vec<String>;

/// The fields that each manager set; one who applies is another than one who updates under the same name.
pub type Owners = BTreeMap<String, BTreeSet<Path>>;

/// The values of an object that are not maps, without those that say which object it is.
pub fn leaves(object: &Value) -> BTreeMap<Path, Value> {
    let mut found = BTreeMap::new();
    collect(object, &mut Vec::new(), &mut found);
    let identity = |path: &Path| {
        let path: Vec<_> = path.iter().map(String::as_str).collect();
        matches!(path[..], ["apiVersion"] | ["kind"] | ["metadata", "name" | "namespace" | "managedFields"])
    };
    found.retain(|path, _| !identity(path));
    found
}

fn collect(value: &Value, path: &mut Path, found: &mut BTreeMap<Path, Value>) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, value) in fields {
                path.push(name.clone());
                collect(value, path, found);
                path.pop();
            }
        }
        Value::Null => {}
        leaf => {
            found.insert(path.clone(), leaf.clone());
        }
    }
}

pub fn get<'a>(object: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter().try_fold(object, |value, name| value.get(name))
}

pub fn set(object: &mut Value, path: &[String], value: Value) {
    let Some((name, rest)) = path.split_first() else {
        *object = value;
        return;
    };
    if !object.is_object() {
        *object = Value::Object(Map::new());
    }
    set(&mut object[name.as_str()], rest, value);
}

pub fn remove(object: &mut Value, path: &[String]) {
    match path {
        [] => {}
        [name] => {
            if let Some(fields) = object.as_object_mut() {
                fields.remove(name);
            }
        }
        [name, rest @ ..] => {
            if let Some(inner) = object.get_mut(name) {
                remove(inner, rest);
            }
        }
    }
}

/// RFC 7386.
pub fn merge(into: &mut Value, patch: &Value) {
    let Value::Object(fields) = patch else {
        *into = patch.clone();
        return;
    };
    if !into.is_object() {
        *into = Value::Object(Map::new());
    }
    for (name, value) in fields {
        match value {
            Value::Null => remove(into, std::slice::from_ref(name)),
            value => merge(&mut into[name.as_str()], value),
        }
    }
}
